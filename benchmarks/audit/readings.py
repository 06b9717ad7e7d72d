"""What a failure means for somebody who runs that server, by check and peer ("*": of all): read by hand, and fair.

"Checked" means that the same attack was made again with the setting that is named, and was beaten back.
"""

READINGS: dict[tuple[str, str], str] = {}
