"""Runs as SLURM jobs: submit (what is sent), task (what a job does), status (where it stands)."""
