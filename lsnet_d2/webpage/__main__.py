"""Open a web page on this machine to try a model on."""

import argparse
import errno
import logging
from typing import TYPE_CHECKING

from detectron2.utils.logger import setup_logger
from PIL import Image

from ..config_file import CONFIG_HELP, load_config
from ..drawing import CONTOUR_STYLES, KEYPOINT_THRESHOLD
from ..errors import UserError, exit_on_user_error
from ..predictor import LSNetPredictor
from .answer import Limits

if TYPE_CHECKING:
    from flask import Flask
    from waitress.server import BaseWSGIServer

logger = logging.getLogger("lsnet_d2.webpage")

_NO_MODEL = (
    "no model: give a checkpoint, for instance the one that `make demo` leaves: "
    "lsnet-demo --config-file output/demo/model_final.pth"
)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lsnet-demo", description=__doc__)
    parser.add_argument("--config-file", metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--weights", metavar="FILE", help="default: MODEL.WEIGHTS of the config")
    parser.add_argument(
        "--examples",
        nargs="+",
        metavar="PATH",
        help="images, or folders of them, to click on; "
        "default: the first of the config's data set for testing, if it is here",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; with another than the default, anybody there can use the page",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free")
    parser.add_argument("--max-megabytes", type=_positive, default=Limits.megabytes, metavar="MB")
    parser.add_argument("--max-megapixels", type=_positive, default=Limits.megapixels, metavar="MP")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, help="where the slider of scores begins"
    )
    parser.add_argument(
        "--keypoint-threshold",
        type=float,
        default=KEYPOINT_THRESHOLD,
        help="keypoints are shown above this score of their own",
    )
    parser.add_argument("--contours", choices=CONTOUR_STYLES, default="filled")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, at the end"
    )
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def make_server(app: "Flask", host: str, port: int, limits: Limits) -> "BaseWSGIServer":
    """A server that listens, and answers once it runs. Requests stay in memory.

    Raises:
        UserError: it cannot listen there.
    """
    from waitress.server import create_server

    try:
        return create_server(
            app,
            host=host,
            port=port,
            ident=None,
            threads=8,  # a browser asks for six things at once
            max_request_body_size=limits.bytes + 1,  # what it refuses is not read
            inbuf_overflow=limits.bytes + 2,  # more would go to a temporary file
            outbuf_overflow=1 << 30,  # the same
        )
    except (OSError, OverflowError, ValueError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            reason = "it is in use: give another --port"
        raise UserError(f"cannot listen on {host}, port {port}: {reason}") from error


def addresses(server: "BaseWSGIServer") -> list[tuple[str, int]]:
    """Where a server listens; a name can have several addresses."""
    if hasattr(server, "effective_listen"):
        return server.effective_listen
    return [(server.effective_host, server.effective_port)]


@exit_on_user_error()
def main(arguments: list[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    if not args.config_file:
        raise UserError(_NO_MODEL)
    try:
        import waitress  # noqa: F401

        from .app import create_app, is_loopback
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install -e '.[web]'") from error
    from .examples import find_examples

    setup_logger(name="lsnet_d2")
    setup_logger(name="fvcore")
    cfg = load_config(args.config_file, args.opts, need_data_sets=False)
    predictor = LSNetPredictor(cfg, weights=args.weights, device=cfg.MODEL.DEVICE)
    files = dict.fromkeys([args.config_file, predictor.cfg.MODEL.WEIGHTS])  # they may be one
    limits = Limits(args.max_megabytes, args.max_megapixels)
    Image.MAX_IMAGE_PIXELS = None  # they are what holds
    only_local = is_loopback(args.host)
    app = create_app(
        predictor,
        title=f"{', '.join(files)}, on {predictor.cfg.MODEL.DEVICE}",
        examples=find_examples(args.examples, predictor.metadata),
        limits=limits,
        threshold=args.confidence_threshold,
        contours=args.contours,
        keypoint_threshold=args.keypoint_threshold,
        only_local=only_local,
    )
    server = make_server(app, args.host, args.port, limits)
    if not only_local:
        logger.warning(
            "Anybody who reaches %s can use this page, without a password and unencrypted",
            args.host,
        )
    for host, port in addresses(server):
        name = f"[{host}]" if ":" in host else host  # IPv6
        logger.info("The page is at http://%s:%s (Ctrl-C ends it)", name, port)
    server.run()


if __name__ == "__main__":
    main()
