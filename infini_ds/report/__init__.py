"""One page about a run for people: `infini-ds report`."""
