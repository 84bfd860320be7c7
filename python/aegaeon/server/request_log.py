"""One line per request: who was asked, how it ended, how long it took. Nothing of what was said."""

import logging

from aegaeon.server.exchange import Exchange

logger = logging.getLogger("aegaeon.requests")


class RequestLog:
    """`ended` is to be told of every exchange.

    every: log all of them, at INFO. Those that ended with a fault of the server's (status 500 and
    above) are logged at WARNING in any case.
    """

    def __init__(self, *, every: bool) -> None:
        self._every = every

    def ended(self, exchange: Exchange) -> None:
        """An exchange is over."""
        failed = exchange.status is not None and exchange.status >= 500
        if not (failed or self._every) or exchange.ended_s is None:
            return
        fields = {
            "request_id": exchange.id,
            "method": exchange.method,
            "route": exchange.route,
            "model": exchange.model,
            "status": exchange.status,
            "error_code": exchange.error_code,
            "first_byte_s": _since(exchange, exchange.first_s),
            "duration_s": _since(exchange, exchange.ended_s),
        }
        shown = {key: value for key, value in fields.items() if value is not None}
        logger.log(
            logging.WARNING if failed else logging.INFO,
            "%s",
            " ".join(f"{key}={value}" for key, value in shown.items()),
            extra={"fields": fields},
        )


def _since(exchange: Exchange, time_s: float | None) -> float | None:
    return None if time_s is None else round(time_s - exchange.began_s, 6)
