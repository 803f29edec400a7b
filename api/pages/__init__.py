"""The results page: templates, and what they show."""
