"""What every tier takes from this host and gives back: control groups or a watchdog in their place, uids, the journal."""
