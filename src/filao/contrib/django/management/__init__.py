"""What Filao adds to `manage.py`."""
