"""Named networks in timm's registry, and how their weights start."""
