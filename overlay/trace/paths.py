"""Where another node's agent is asked to count."""

BEGIN, END = "/trace/begin", "/trace/end"
