"""Does a run fit devices that are not here? Its training step is compiled for them, and read; nothing is trained."""
