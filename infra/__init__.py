"""What namr runs beside on one machine: an object store, an MLflow server, a Ray of several nodes."""
