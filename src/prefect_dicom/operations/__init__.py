"""What operators do beside runs: examine, verify, rebuild, empty the quarantine."""
