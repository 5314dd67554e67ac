"""What happens, in which order: the flows a user runs or deploys."""
