"""What a cell put out, as the bounded content of an MCP answer: text and pictures in their order."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interp_kernel.mcp.compact import IMAGES, PLOTLY, joined, text_of_output
from interp_kernel.mcp.drawing import draw

Block = dict[str, Any]
"""A content block of MCP: `{"type": "text", "text": ...}` or `{"type": "image", "data": base64, "mimeType": ...}`."""

TEXT_BYTES = 16_000
PICTURES = 6
SIDE = 768
PICTURE_BYTES = 300_000
PIXELS = 40_000_000
"""A picture of more pixels is not opened: some kilobytes can unpack to gigabytes."""
NOTICE_BYTES = 150
"""Room for what is said where text is left out; twice that is the least that an output is given."""
SEPARATOR = "\n"


@dataclass(frozen=True)
class Piece:
    """One output: its text, where that begins in the text of all, and its picture."""

    start: int
    text: str
    output: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the text."""
        return len(self.text.encode())


def text_of(outputs: Sequence[Mapping[str, Any]]) -> str:
    """The whole text of a cell's outputs, which `read_output` slices: no colours, no pictures."""
    return SEPARATOR.join(piece.text for piece in _pieces(outputs))


def render(outputs: Sequence[Mapping[str, Any]], *, cell_id: str, limit: int = TEXT_BYTES) -> list[Block]:
    """The content of an answer for a cell's outputs.

    Args:
        outputs: As the notebook holds them, neighbouring texts of one stream joined.
        cell_id: Named where text is left out, as the handle for the rest.
        limit: The most bytes of text in all blocks together.

    Returns:
        Blocks in the order of the outputs. Of long outputs the head and the tail are shown, with what is left out
        and how to read it; short ones beside them are whole. Of very many outputs the first and the last are shown.
        Pictures are scaled to at most `SIDE` pixels; of more than `PICTURES` the rest is one line each.
    """
    pieces = list(_pieces(outputs))
    half = max(1, limit // NOTICE_BYTES // 4)
    left_out = pieces[half:-half] if len(pieces) > 2 * half else []
    shown = [*pieces[:half], *pieces[-half:]] if left_out else pieces
    pictures = _pictures([piece.output for piece in shown])
    level = shared([piece.size for piece in shown], limit - NOTICE_BYTES - 60 * len(pictures))
    blocks: list[Block] = []
    for index, piece in enumerate(shown):
        if left_out and index == half:
            _say(blocks, _outputs_left_out(left_out, cell_id))
        _say(blocks, cut(piece.text, level, cell_id, piece.start))
        if id(piece.output) in pictures:
            blocks += pictures[id(piece.output)]
    return _merged(blocks)


def cut(text: str, limit: int, cell_id: str, start: int = 0, rest: str = "") -> str:
    """Head and tail of a text that is longer than `limit` bytes, and between them how to read the rest."""
    data = text.encode()
    if len(data) <= limit:
        return text
    half = max(0, limit - NOTICE_BYTES) // 2
    head = data[:half].decode(errors="ignore")
    tail = data[len(data) - half :].decode(errors="ignore")
    first, last = len(head), len(text) - len(tail)
    rest = rest or f'read_output(cell_id="{cell_id}", start={start + first}) reads on'
    return f"{head}\n[{last - first:,} of {len(text):,} characters left out; {rest}]\n{tail}"


# ------------------------------------------------------------------------------------------------ text


def _pieces(outputs: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
    start = 0
    for output in outputs:
        text = text_of_output(output)
        if output.get("name") == "stderr":
            text = f"[stderr] {text}"
        yield Piece(start, text, output)
        start += len(text) + len(SEPARATOR)


def shared(sizes: list[int], limit: int) -> int:
    """The size to which the longest must be cut so that all together fit: short ones stay whole."""
    left = max(0, limit - len(sizes))
    for position, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - position)
        if size > share:
            return share
        left -= size
    return limit


def _outputs_left_out(pieces: list[Piece], cell_id: str) -> str:
    return f'[{len(pieces):,} more outputs; read_output(cell_id="{cell_id}", start={pieces[0].start}) reads them]'


def _say(blocks: list[Block], text: str) -> None:
    if text:
        blocks.append({"type": "text", "text": text})


def _merged(blocks: list[Block]) -> list[Block]:
    """Neighbouring texts as one block."""
    merged: list[Block] = []
    for block in blocks:
        if merged and block["type"] == merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + SEPARATOR + block["text"]}
        else:
            merged.append(block)
    return merged


# -------------------------------------------------------------------------------------------- pictures


def _pictures(outputs: list[Mapping[str, Any]]) -> dict[int, list[Block]]:
    """Blocks of the pictures among some outputs, by the output's identity."""
    drawn = draw([output["data"][PLOTLY] for output in outputs if PLOTLY in _data(output) and not _image(output)])
    found: dict[int, list[Block]] = {}
    for output in outputs:
        image = _image(output)
        if image is None and PLOTLY in _data(output):
            image = drawn.pop(0)
            if image is None:
                continue
        if image is not None:
            too_many = len(found) >= PICTURES
            found[id(output)] = [_line("not shown: the answer has enough of them")] if too_many else _scaled(image)
    return found


def _data(output: Mapping[str, Any]) -> Mapping[str, Any]:
    data = output.get("data", {})
    return data if isinstance(data, Mapping) else {}


def _image(output: Mapping[str, Any]) -> bytes | None:
    data = _data(output)
    kind = next((kind for kind in IMAGES if kind in data), None)
    if kind is None:
        return None
    try:
        return base64.b64decode(joined(data[kind]))
    except (binascii.Error, ValueError):
        return b""


def _scaled(data: bytes) -> list[Block]:
    """A line about a picture and the picture, small enough."""
    from PIL import Image

    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > PIXELS:
            raise Image.DecompressionBombError
        image.load()
    except Image.DecompressionBombError:
        return [_line("too large to show")]
    except (OSError, ValueError, SyntaxError) as error:
        return [_line(f"that can't be read: {type(error).__name__}")]
    image.thumbnail((SIDE, SIDE))
    small, kind = _encoded(image)
    at = "" if image.size == (width, height) else f", shown at {image.width} x {image.height}"
    line = _line(f"{width} x {height}{at}")
    return [line, {"type": "image", "data": base64.b64encode(small).decode(), "mimeType": kind}]


def _encoded(image: Any) -> tuple[bytes, str]:
    """A picture as PNG, or as JPEG where that would be too large."""
    if image.mode not in ("RGB", "RGBA", "L", "P", "1", "LA"):
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    for quality in (85, 60, 35):
        if file.tell() <= PICTURE_BYTES:
            break
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue(), "image/png" if file.getvalue().startswith(b"\x89PNG") else "image/jpeg"


def _line(text: str) -> Block:
    return {"type": "text", "text": f"[image {text}]"}
