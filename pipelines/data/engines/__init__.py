"""What executes a plan: DALI, or Pillow in threads. An engine draws no random number and owns no order."""
