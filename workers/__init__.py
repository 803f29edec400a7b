"""What it costs: models, quantizers, sensitivities and measurements. Knows search and db; torch lives here."""
