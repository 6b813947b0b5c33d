"""What two processes must agree on. Knows nothing of models, requests' meaning or policy."""
