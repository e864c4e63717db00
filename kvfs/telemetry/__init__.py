"""What can be seen of a running store: metrics, traces, events, a status page. See DESIGN.md."""


def serve(store, port: int, **options):
    """Metrics and a status page at http://127.0.0.1:PORT: see http_server.MetricsServer."""
    from kvfs.telemetry.http_server import MetricsServer  # not for who opens a store and nothing else

    return MetricsServer(store, port, **options)
