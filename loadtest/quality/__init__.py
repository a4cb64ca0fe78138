"""What reusing keys and values costs in answers: tasks, measurements, tables."""
