"""What all controllers share: the contract, the inputs, the schedule, problems and readiness."""
