"""What happens in a worker, as events (`events.py`), and one file for each thing that is made of them.

`worker_metrics.py`: counters and histograms; `spans.py`: OpenTelemetry spans. `otel.py` says whether OpenTelemetry is
asked for, `exposition.py` and `endpoint.py` show metrics over HTTP, `otlp_metrics.py` pushes them.
"""
