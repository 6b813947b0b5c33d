"""The TE-shell: leads the prefill workers. Which of them computes which prompt, when, and what becomes of it."""
