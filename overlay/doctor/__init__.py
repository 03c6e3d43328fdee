"""What of this machine keeps, or may keep, pods from reaching each other: asked when the operator asks."""
