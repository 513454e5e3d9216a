"""Tables and pictures of masks: densities, overlaps, the Fisher spectrum."""
