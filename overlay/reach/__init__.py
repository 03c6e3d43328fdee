"""Whether the kernel would do with packets of pods what they need: routes, rules and filters that are not ours."""
