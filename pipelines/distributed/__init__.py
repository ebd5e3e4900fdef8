"""What several processes of a run share, and what they run on: start, agreement, exit codes, stop requests, devices."""
