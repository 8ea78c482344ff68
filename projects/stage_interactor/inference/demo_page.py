"""The web page of ``stage-interactor demo``, by gradio. What it shows is made in :mod:`.demo`."""

import os
from typing import Any

from ..errors import UserError, explain
from ..pages.serving import require_port, tell_address
from ..untrusted.pictures import max_pixels
from .demo import Demo, Seen

_MOST_BYTES = 8  # of a file for each pixel that is read
_SESSIONS = 20  # whose pictures are kept
_KEPT = 3600  # seconds for which gradio keeps files


def serve(demo: Demo, *, host: str = "127.0.0.1", port: int = 7860, wait: bool = True) -> Any:
    """Serves the page until Ctrl-C.

    Nothing is sent anywhere: there is no public link and no telemetry, and the page asks this
    server alone.

    Args:
        host: what it listens on; others than 127.0.0.1 let other machines use it.
        port: of it.
        wait: for Ctrl-C; else it goes on until ``close()`` of what is returned.

    Raises:
        UserError: gradio is not installed.
        ValueError: the port cannot be had.
    """
    require_port(host, port)
    page, theme = build_page(demo)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=_MOST_BYTES * max_pixels(),
        state_session_capacity=_SESSIONS,
        theme=theme,
        prevent_thread_lock=True,
    )
    tell_address(host, port)
    if wait:
        page.block_thread()
    return page


def build_page(demo: Demo) -> tuple[Any, Any]:
    """Gradio's blocks, and their theme.

    Raises:
        UserError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError(
            "the demo needs the package gradio: pip install 'stage-interactor[demo]'"
        ) from error

    def show(seen: Seen | None, told: str = "") -> tuple:
        """Of another picture or threshold; the stages are of none of its boxes yet."""
        if seen is None:
            return None, None, told, "", None, None
        hint = "Click a box to see its stages." if len(seen.given) else ""
        return seen, demo.draw(seen), demo.told(seen), hint, None, None

    def threshold(own: bool, score: float) -> float | None:
        return None if own else score

    def look(path: str | None, own: bool, score: float) -> tuple:
        if path is None:
            return show(None)
        try:
            return show(demo.see(path, threshold(own, score)))
        except Exception as error:
            if (told := explain(error)) is None:
                raise
            return show(None, told.replace(path, os.path.basename(path)))

    def choose(seen: Seen | None, own: bool, score: float) -> tuple:
        return show(None if seen is None else demo.choose(seen, threshold(own, score)))

    def click(seen: Seen | None, event: gr.SelectData) -> tuple:
        index = None if seen is None else seen.at(*event.index)
        if seen is None or index is None:
            return "There is no box.", None, None
        try:
            told, pictures = demo.stages(seen, index)
        except Exception as error:
            if (text := explain(error)) is None:
                raise
            told, pictures = text, []
        return (told, *pictures) if pictures else (told, None, None)

    has_own = demo.detector.thresholds is not None
    with gr.Blocks(
        title="StageInteractor", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)
    ) as page:
        seen = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1):
                # Not as an image, which gradio would decode, whatever it is, before it is screened.
                file = gr.File(label="Picture", elem_id="picture")
                own = gr.Checkbox(
                    has_own, label="The checkpoint's thresholds, by class", visible=has_own
                )
                score = gr.Slider(
                    0, 1, demo.start, step=0.01, label="Threshold, of all classes", elem_id="score"
                )
                told = gr.Textbox(label="Found", interactive=False, elem_id="told")
            with gr.Column(scale=3):
                shown = gr.Image(
                    label="Detections", interactive=False, format="png", buttons=["fullscreen"],
                    elem_id="detections",
                )  # fmt: skip
        caption = gr.Textbox(label="Stages", interactive=False, elem_id="caption")
        with gr.Row():
            options: dict[str, Any] = {"interactive": False, "format": "png"}
            options["buttons"] = ["fullscreen"]
            boxes = gr.Image(label="Its box, stage by stage", elem_id="boxes", **options)
            points = gr.Image(label="Its sampling points", elem_id="points", **options)
        outputs: list[Any] = [seen, shown, told, caption, boxes, points]
        private: dict[str, Any] = {"api_visibility": "private"}
        file.change(look, [file, own, score], outputs, **private)
        own.input(choose, [seen, own, score], outputs, **private)
        score.input(lambda: False, None, own, queue=False, **private)
        score.release(
            lambda seen, score: choose(seen, False, score), [seen, score], outputs, **private
        )
        shown.select(click, [seen], [caption, boxes, points], **private)
    # Gradio's own theme asks another host for its letters.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return page, theme
