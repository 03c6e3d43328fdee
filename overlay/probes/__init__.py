"""Whether peers answer: pings in the background, and on request."""
