"""The web application: one page, its pictures, and the request that runs the model."""

import ipaddress
import logging
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import matplotlib.colors
from flask import Flask, Response, abort, jsonify, render_template, request, send_file
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from ..drawing import CONTOUR_STYLES, KEYPOINT_THRESHOLD
from ..errors import UserError, one_line
from ..predictor import LSNetPredictor
from ..visualizer import PALETTE
from .answer import Limits, answer, describe_skeleton
from .examples import Example

# The page loads nothing from elsewhere, and the browser is told to see to that.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

logger = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from its own machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def create_app(
    predictor: LSNetPredictor,
    *,
    title: str = "",
    examples: Sequence[Example] = (),
    limits: Limits | None = None,
    threshold: float = 0.5,
    contours: str = "filled",
    keypoint_threshold: float = KEYPOINT_THRESHOLD,
    only_local: bool = True,
) -> Flask:
    """
    The routes are ``/``, ``/detect`` (POST: the file as body, its name as query ``name``; answers
    what :func:`answer` returns, or ``error``) and ``/examples/<number>``.

    Args:
        predictor: runs one picture at a time, however many requests there are.
        title: what the page says of the model.
        examples: pictures to click on.
        limits: None: the default ones.
        threshold: score from which detections are shown at first, in [0, 1].
        contours: how they are drawn at first, one of CONTOUR_STYLES.
        keypoint_threshold: keypoints are drawn and written above this score.
        only_local: refuse requests that name another host than this machine, as those are that a
            web site gets through by giving its own name this machine's address.
    """
    limits = limits or Limits()
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = limits.bytes
    one_at_a_time = threading.Lock()  # a model keeps what it needs for an image in itself
    settings = {
        "bones": describe_skeleton(predictor.metadata),
        "palette": [matplotlib.colors.to_hex(color) for color in PALETTE],
        "maxBytes": limits.bytes,
        "tooLarge": too_large(limits),
    }

    @app.before_request
    def check_host() -> tuple[Any, int] | None:
        name = urlsplit(f"//{request.host}").hostname or ""
        if only_local and not is_loopback(name):
            return refuse("this page is reached as localhost or 127.0.0.1 only", 400)
        return None

    @app.get("/")
    def page() -> str:
        return render_template(
            "index.html",
            title=title,
            settings=settings,
            examples=examples,
            limits=limits,
            threshold=min(max(threshold, 0.0), 1.0),
            contours=contours,
            contour_styles=CONTOUR_STYLES,
        )

    @app.get("/examples/<int:number>")
    def example(number: int) -> Response:
        return send_file(_example(number).path.resolve(), max_age=0)

    @app.get("/examples/<int:number>/thumbnail")
    def thumbnail(number: int) -> Response:
        return Response(_example(number).thumbnail, mimetype="image/jpeg")

    def _example(number: int) -> Example:
        return examples[number] if number < len(examples) else abort(404)

    @app.post("/detect")
    def detect() -> Response:
        # Browsers send other types from any web site without asking this server first
        if request.mimetype != "application/octet-stream":
            abort(415)
        name = request.args.get("name", "")
        data = request.get_data(cache=False)
        with one_at_a_time:
            content = answer(
                predictor, data, name, limits=limits, keypoint_threshold=keypoint_threshold
            )
        logger.info("%d objects in %s s", len(content["detections"]), content["seconds"])
        return jsonify(content)

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    def refuse(message: str, status: int) -> tuple[Any, int]:
        return jsonify(error=message), status

    @app.errorhandler(UserError)
    def user_error(error: UserError) -> tuple[Any, int]:
        return refuse(one_line(error), 400)

    @app.errorhandler(RequestEntityTooLarge)
    def entity_too_large(error: RequestEntityTooLarge) -> tuple[Any, int]:
        return refuse(too_large(limits), 413)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[Any, int]:
        return refuse(f"{error.code} {error.name}", error.code)

    @app.errorhandler(Exception)
    def bug(error: Exception) -> tuple[Any, int]:
        logger.error("A picture failed", exc_info=error)
        return refuse("this picture failed by a fault of the program; its log says more", 500)

    return app


def too_large(limits: Limits) -> str:
    return f"the file has more than the {limits.megabytes:g} MB accepted here (--max-megabytes)"
