"""What happened: searches, their events, results and candidates, in Postgres."""
