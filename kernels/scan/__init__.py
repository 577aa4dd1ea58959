"""What the scans share: which steps they walk, their checks, and the CPU walks' frame. No op of its own."""
