"""Example networks for train.py, each short enough to read in one sitting."""
