"""A test machine whose only cgroups are v2: how it is made (disks), started (machine), what it runs (chosen, world)."""
