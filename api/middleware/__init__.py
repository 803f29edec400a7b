"""What surrounds every answer, one concern per file; `api.app` says in which order."""
