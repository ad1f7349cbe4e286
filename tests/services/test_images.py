"""Bodies: what goes in comes out, and what is no picture is refused by its index."""

import base64
import io
import json
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image, ImageCms

from services.bounds import MOST_SCANS, scans_of
from services.images import (
    Batch,
    BodyError,
    BodyMalformed,
    BodyTooLarge,
    ItemInvalid,
    decode_batch,
    decode_file,
    decode_json,
    encode_batch,
    encode_json,
    encode_png,
)
from services.protocol import Limits
from tests.services.conftest import ROOT, random_images

LIMITS = Limits(max_images=8, max_body_bytes=100_000, max_pixels=64 * 64, max_prompt_chars=50)

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.just(3))
IMAGES = SHAPES.flatmap(lambda shape: st_numpy.arrays(np.uint8, shape))


def as_array(batch: Batch) -> np.ndarray:
    """The images of a batch as one array."""
    return np.stack(list(batch.images_HWC))


def json_body(*files: bytes, prompts: object = None) -> bytes:
    """A JSON body of files."""
    body = {"images": [base64.b64encode(file).decode() for file in files]}
    return json.dumps(body if prompts is None else {**body, "prompts": prompts}).encode()


def picture(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png(depth: int, colour: int, *pixels: int, extra: bytes = b"") -> bytes:
    """A PNG of one row, written by hand: Pillow writes fewer kinds than it reads. `pixels` are the row's values."""
    row = struct.pack(f">{len(pixels)}{'H' if depth == 16 else 'B'}", *pixels)
    width = len(pixels) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + data + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@settings(deadline=None)
@given(images_BHWC=IMAGES, data=st.data())
def test_safetensors_and_json_bodies_round_trip(images_BHWC: np.ndarray, data: st.DataObject) -> None:
    """Pixels and prompts survive both encodings to the last bit."""
    count = len(images_BHWC)
    prompts = data.draw(st.none() | st.lists(st.text(max_size=20), min_size=count, max_size=count))
    for encode, decode in ((encode_batch, decode_batch), (encode_json, decode_json)):
        batch = decode(encode(images_BHWC, prompts), LIMITS)
        assert np.array_equal(as_array(batch), images_BHWC)
        assert batch.prompts == prompts


def test_the_safetensors_library_reads_what_we_write_and_we_read_what_it_writes() -> None:
    """The fast path is the published format."""
    images_BHWC = random_images(3, 5, 7, 3)
    assert np.array_equal(safetensors.numpy.load(encode_batch(images_BHWC, ["a", "b", "ü"]))["images"], images_BHWC)
    batch = decode_batch(safetensors.numpy.save({"images": images_BHWC}, {"prompts": '["a","b","ü"]'}), LIMITS)
    assert np.array_equal(as_array(batch), images_BHWC)
    assert batch.prompts == ["a", "b", "ü"]


def test_a_strided_array_is_written_in_its_own_order() -> None:
    """A view is encoded by its values, not by its memory."""
    images_BHWC = random_images(4, 6, 6, 3)[::2, ::-1, 1:]
    assert np.array_equal(as_array(decode_batch(encode_batch(images_BHWC), LIMITS)), images_BHWC)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_mutated_body_is_refused_or_read_but_never_crashes(data: st.DataObject) -> None:
    """Whatever the bytes, the only error is a `BodyError`."""
    whole = bytearray(data.draw(st.sampled_from([encode_batch(random_images(2, 4, 4, 3), ["a", "b"]), BODY])))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    body = whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    for decode in (decode_batch, decode_json):
        try:
            batch = decode(body, LIMITS)
        except BodyError:
            continue
        assert all(image.dtype == np.uint8 and image.ndim == 3 for image in batch.images_HWC)


BODY = json_body(picture(Image.new("RGB", (4, 4))), picture(Image.new("RGB", (4, 4)), "JPEG"), prompts=["a", "b"])


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (b"", BodyMalformed, "0 bytes"),
        (struct.pack("<Q", 2**60) + b"{}", BodyMalformed, "header claims"),
        (encode_batch(random_images(2, 4, 4, 3))[:-1], BodyMalformed, "truncated"),
        (encode_batch(random_images(2, 4, 4, 3)) + b"x", BodyMalformed, "padded"),
        (safetensors.numpy.save({"images": np.zeros((2, 4, 4, 3), np.float32)}), BodyMalformed, "expected U8"),
        (safetensors.numpy.save({"images": np.zeros((4, 4, 3), np.uint8)}), BodyMalformed, "expected U8"),
        (safetensors.numpy.save({"other": np.zeros((1, 4, 4, 3), np.uint8)}), BodyMalformed, "named 'images'"),
        (
            safetensors.numpy.save({"images": np.zeros((1, 4, 4, 3), np.uint8)}, {"prompts": "[1]"}),
            BodyMalformed,
            "prompts",
        ),
        (encode_batch(random_images(9, 4, 4, 3)), BodyTooLarge, "9 images in one request, limit 8"),
        (encode_batch(random_images(1, 65, 64, 3)), BodyTooLarge, "65×64"),
        (encode_batch(random_images(2, 4, 4, 3), ["a", "b" * 51]), ItemInvalid, "prompt 1 has 51 characters, limit 50"),
    ],
)
def test_a_bad_safetensors_body_is_refused_in_words(body: bytes, error: type[BodyError], words: str) -> None:
    """The message says the value and the limit."""
    with pytest.raises(error, match=words):
        decode_batch(body, LIMITS)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(picture(Image.new("RGB", (32, 32), "red"))[:-30], id="truncated PNG"),
        pytest.param(picture(Image.effect_noise((32, 32), 50), "JPEG")[:-200], id="truncated JPEG"),
        pytest.param(b"no picture", id="text"),
        pytest.param(b"", id="empty"),
        pytest.param(picture(Image.new("RGB", (4, 4)), "BMP"), id="a format not on the list"),
        pytest.param(picture(Image.new("1", (65, 64))), id="too many pixels"),
        pytest.param(picture(Image.new("1", (20_000, 20_000))), id="decompression bomb"),
        pytest.param(
            picture(Image.new("RGB", (4, 4)), "WEBP", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]),
            id="animated WebP",
        ),
        pytest.param(
            picture(Image.new("RGB", (4, 4)), save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]),
            id="APNG",
        ),
        pytest.param(picture(Image.new("RGB", (4, 4)), "GIF"), id="GIF"),
        pytest.param(picture(Image.new("RGB", (4, 4)), "TIFF"), id="TIFF"),
        pytest.param(png(8, 2, 1, 2, 3, extra=png_chunk(b"acTL", bytes(4))), id="broken APNG"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_index(bad: bytes) -> None:
    """Of three images the second is bad: the error names index 1."""
    good = picture(Image.new("RGB", (4, 4)))
    with pytest.raises(ItemInvalid) as caught:
        decode_json(json_body(good, bad, good), LIMITS)
    assert caught.value.index == 1
    assert "image 1" in str(caught.value)


def of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again, until there are so many: 16 bytes each."""
    whole = picture(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    scans = whole.count(b"\xff\xda")
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * (count - scans) + whole[-2:]


def test_a_jpeg_of_countless_scans_is_refused() -> None:
    """Each costs as much as a picture, and a few kilobytes hold thousands; by its index, like any bad picture."""
    assert decode_json(json_body(of_scans(100)), LIMITS).images_HWC[0].shape == (64, 64, 3)
    with pytest.raises(ItemInvalid, match="image 1 is a JPEG of 101 scans, limit 100"):
        decode_json(json_body(of_scans(6), of_scans(101)), LIMITS)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_no_encoder_comes_near_the_bound_on_scans(mode: str) -> None:
    """A twentieth or a fifth of it are in a picture; the markers of a scan within a film behind it are no scans."""
    whole = picture(Image.effect_noise((64, 64), 50).convert(mode), "JPEG", progressive=True, quality=100)
    assert 1 < scans_of(whole) <= MOST_SCANS / 5
    assert decode_json(json_body(whole + b"\xff\xda film" * 200), LIMITS).images_HWC[0].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("whole", "start", "part"),
    [
        (picture(Image.new("RGB", (4, 4)), "JPEG"), 2, b"\xff\xef\0\2"),
        (png(8, 2, 1, 2, 3), 33, png_chunk(b"teSt", b"")),
        (png(8, 2, 1, 2, 3), 33, png_chunk(b"IDAT", b"")),
        (png(8, 2, 1, 2, 3), -12, png_chunk(b"teSt", b"")),
    ],
    ids=["JPEG", "PNG", "data of a PNG", "end of a PNG"],
)
def test_a_picture_of_countless_parts_is_refused(whole: bytes, start: int, part: bytes) -> None:
    """Of each a decoder keeps a note, many times its size; a thousand of them are fine."""
    few, many = (whole[:start] + count * part + whole[start:] for count in (1000, 100_000))
    assert decode_file(few, LIMITS).images_HWC[0].shape[2] == 3
    with pytest.raises(ItemInvalid, match="image 0 has more parts than 100000 reads take"):
        decode_file(many, LIMITS)


def test_base64_is_checked() -> None:
    """Characters outside the alphabet are refused, not skipped."""
    with pytest.raises(ItemInvalid, match="image 0 is not base64"):
        decode_json(b'{"images": ["@@@@"]}', LIMITS)


def test_a_header_is_utf8_alone() -> None:
    """As the format demands; other programs would read another header."""
    header = json.dumps({"images": {"dtype": "U8", "shape": [1, 1, 1, 3], "data_offsets": [0, 3]}})
    for encoding, is_right in (("utf-8", True), ("utf-16", False), ("utf-32", False)):
        data = header.encode(encoding)
        body = safetensors_of(data, b"abc")
        if is_right:
            assert len(decode_batch(body, LIMITS).images_HWC) == 1
        else:
            with pytest.raises(BodyMalformed, match="not JSON"):
                decode_batch(body, LIMITS)


@pytest.mark.parametrize(
    ("item", "count", "name"),
    [(b'""', 30, "quotation marks"), (b"1", 40, "commas"), (b"[[1]]", 30, "brackets"), (b"{}", 37, "braces")],
)
def test_a_body_of_countless_short_values_is_refused_unparsed(item: bytes, count: int, name: str) -> None:
    """Parsed, it would take many times its size."""
    limits = Limits(max_images=2, max_prompt_chars=10)
    with pytest.raises(BodyTooLarge, match=f"{name}, limit 36: send fewer images or shorter prompts"):
        decode_json(b'{"images": [' + b",".join([item] * count) + b"]}", limits)


@pytest.mark.parametrize("mark", ['"', ",", "[", "{"])
def test_a_prompt_of_nothing_but_marks_is_still_a_prompt(mark: str) -> None:
    """As long as it may be, for as many images as there may be."""
    limits = Limits(max_images=2, max_prompt_chars=10)
    picture = base64.b64encode(encode_png(random_images(2, 2, 3))).decode()
    body = {"images": [picture] * 2, "prompts": [mark * 10] * 2}
    assert decode_json(json.dumps(body).encode(), limits).prompts == body["prompts"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"images": []}', b'{"images": [1]}', b'{"images": ["AA=="], "more": 1}', b"\xff"]
)
def test_malformed_json_is_refused(body: bytes) -> None:
    """It must be the object that the contract describes."""
    with pytest.raises(BodyMalformed):
        decode_json(body, LIMITS)


def safetensors_of(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize("prompt", ["\U0001f5bc", '"', "\\", "\0", ","])
def test_a_header_has_room_for_all_the_prompts_that_there_may_be(prompt: str) -> None:
    """However JSON writes them, twice; and for a little of another program's."""
    prompts = [prompt * LIMITS.max_prompt_chars] * LIMITS.max_images
    images_BHWC = random_images(LIMITS.max_images, 1, 1, 3)
    body = safetensors.numpy.save(
        {"images": images_BHWC}, {"prompts": json.dumps(prompts), "more": "x" * 1000, **dict.fromkeys("abc", ",")}
    )
    assert decode_batch(body, LIMITS).prompts == decode_batch(encode_batch(images_BHWC, prompts), LIMITS).prompts
    assert decode_batch(body, LIMITS).prompts == prompts


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ('{"x":"' + "x" * 80_000 + '"}', r"header claims 80\d{3} bytes of 80\d{3} \(limit 71184\)"),
        ('{"x":[' + "1," * 1000 + "1]}", "more than 1000 commas"),
        ('{"x":["' + '\\\\","' * 1000 + '"]}', "more than 1000 commas"),
        ('{"prompts":"[' + "1," * 9 + '1]"}', "more prompts than 8 images may have"),
    ],
    ids=["long", "values", "strings", "prompts"],
)
def test_a_header_of_countless_values_is_refused_unparsed(metadata: str, words: str) -> None:
    """Nothing else runs while it is parsed: what no batch needs is counted, and not parsed."""
    header = '{"images":{"dtype":"U8","shape":[1,1,1,3],"data_offsets":[0,3]},"__metadata__":' + metadata + "}"
    with pytest.raises(BodyMalformed, match=words):
        decode_batch(safetensors_of(header.encode(), b"abc"), LIMITS)


def test_a_body_of_wrong_items_costs_no_more_than_its_size() -> None:
    """The first wrong item is named; the other hundred thousand are not turned into errors of their own."""
    body = json.dumps({"images": [1] * 100_000}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(BodyMalformed, match=r"images\.0: Input should be a valid string"):
            decode_json(body, Limits())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(body)


def test_the_decoded_pixels_count_against_the_limit_of_bytes() -> None:
    """Eight small files of 12 288 bytes of pixels each are fine by their files and too large decoded."""
    limits = LIMITS.model_copy(update={"max_body_bytes": 50_000})
    files = [picture(Image.new("RGB", (64, 64)))] * 8
    with pytest.raises(BodyTooLarge, match="50000"):
        decode_json(json_body(*files), limits)


def over_white(*values: int, alpha: int) -> tuple[int, ...]:
    """Colours laid over white."""
    return tuple(round((value * alpha + 255 * (255 - alpha)) / 255) for value in values)


PALETTE = png_chunk(b"PLTE", bytes((10, 20, 30, 40, 50, 60)))
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
ALPHA = 128
KEY_16 = png_chunk(b"tRNS", struct.pack(">HHH", 0x80FF, 0x01FF, 0xFE01))

TREATMENTS = {
    "grey": [(png(8, 0, 7), (7, 7, 7)), (png(1, 0, 0x80), (255, 255, 255)), (png(4, 0, 0x80), (136, 136, 136))],
    "grey JPEG": [(picture(Image.new("L", (8, 8), 100), "JPEG"), (100, 100, 100))],
    "grey with alpha": [(png(8, 4, 10, ALPHA), over_white(10, 10, 10, alpha=ALPHA)), (png(8, 4, 10, 0), (255,) * 3)],
    "palette": [(png(8, 3, 1, extra=PALETTE), (40, 50, 60))],
    "palette with transparency": [
        (png(8, 3, 0, extra=PALETTE + png_chunk(b"tRNS", bytes([ALPHA]))), over_white(10, 20, 30, alpha=ALPHA)),
        (png(8, 3, 1, extra=PALETTE + png_chunk(b"tRNS", bytes([ALPHA]))), (40, 50, 60)),
    ],
    "RGBA": [
        (png(8, 6, 10, 20, 30, ALPHA), over_white(10, 20, 30, alpha=ALPHA)),
        (png(8, 6, 10, 20, 30, 255), (10, 20, 30)),
        (picture(Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "WEBP", lossless=True), (255, 255, 255)),
    ],
    "transparent colour": [
        (png(8, 2, 1, 2, 3, extra=png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))), (255, 255, 255)),
        (png(8, 2, 1, 2, 4, extra=png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))), (1, 2, 4)),
        (png(8, 0, 5, extra=png_chunk(b"tRNS", struct.pack(">H", 5))), (255, 255, 255)),
    ],
    "CMYK": [
        (picture(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
        (picture(Image.new("CMYK", (8, 8), (255, 0, 0, 100)), "JPEG"), (0, 155, 155)),
        (picture(Image.new("CMYK", (8, 8), (100, 0, 51, 100)), "JPEG", quality=100), (94, 155, 124)),
    ],
    "16-bit grey": [(png(16, 0, 0x80FF), (0x80,) * 3), (png(16, 4, 0x80FF, 0xFFFF), (0x80,) * 3)],
    "16-bit RGB": [
        (png(16, 2, 0x80FF, 0x01FF, 0xFE01), (0x80, 0x01, 0xFE)),
        (png(16, 6, 0x80FF, 0x01FF, 0xFE01, 0xFFFF), (0x80, 0x01, 0xFE)),
    ],
    "16 bits with a transparent colour": [
        (png(16, 2, 0x80FF, 0x01FF, 0xFE01, extra=KEY_16), (0x80, 0x01, 0xFE)),
        (png(16, 2, 0xFF00, 0xFF00, 0x0100, extra=KEY_16), (0xFF, 0xFF, 0x01)),  # its lower bytes are the key's
        (png(16, 0, 0x80FF, extra=png_chunk(b"tRNS", struct.pack(">H", 0x80FF))), (0x80,) * 3),
    ],
    "colour profile": [
        (picture(Image.new("RGB", (8, 8), (10, 20, 30)), kind, icc_profile=PROFILE, **options), (10, 20, 30))
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}))
    ]
    + [(png(8, 2, 10, 20, 30, extra=png_chunk(b"gAMA", struct.pack(">I", 100_000))), (10, 20, 30))],
    "several pictures in a JPEG (MPO)": [
        (
            picture(Image.new("L", (8, 8), 50), "MPO", save_all=True, append_images=[Image.new("L", (8, 8), 200)]),
            (50, 50, 50),
        )
    ],
    "broken EXIF": [
        (png(8, 2, 1, 2, 3, extra=png_chunk(b"eXIf", b"garbage")), (1, 2, 3)),
        (picture(Image.new("L", (8, 8), 50), "JPEG", exif=b"Exif\0\0garbage!"), (50, 50, 50)),
    ],
}
"""By their row in docs/contract.md: files, and the colour of their first pixel."""


@pytest.mark.parametrize("kind", TREATMENTS)
def test_other_kinds_of_pictures_become_rgb(kind: str) -> None:
    """As the table in docs/contract.md has it."""
    files, colours = zip(*TREATMENTS[kind], strict=True)
    images = decode_json(json_body(*files), LIMITS).images_HWC
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)
    assert [tuple(image[0, 0].tolist()) for image in images] == list(colours)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_exif_rotation_is_applied(kind: str, options: dict[str, object], orientation: int) -> None:
    """All eight orientations, in all three formats; the definition is that of the EXIF standard: what is at row 0 and
    at column 0 of the file."""
    upright_HW = np.zeros((16, 32), np.uint8)
    upright_HW[:8, :8] = 100
    upright_HW[:8, 24:] = 200
    turned = {
        1: upright_HW,
        2: upright_HW[:, ::-1],
        3: upright_HW[::-1, ::-1],
        4: upright_HW[::-1],
        5: upright_HW.T,
        6: upright_HW.T[::-1],
        7: upright_HW.T[::-1, ::-1],
        8: upright_HW.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = picture(Image.fromarray(np.repeat(turned[:, :, None], 3, axis=2)), kind, exif=exif, **options)
    (image_HWC,) = decode_json(json_body(file), LIMITS).images_HWC
    assert image_HWC.shape == (16, 32, 3)
    assert np.abs(image_HWC[:, :, 0].astype(int) - upright_HW).max() <= 3


def test_the_table_of_treatments_is_tested_row_by_row() -> None:
    """Each row of docs/contract.md names its test, and each kind tested here stands there."""
    page = (ROOT / "docs" / "contract.md").read_text("utf-8")
    table = page.split("## Pictures")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", table, flags=re.MULTILINE)[1:]
    tested = {
        *TREATMENTS,
        "EXIF rotation",
        "pictures of several sizes",
        "animation",
        "not whole",
        "too many scans or parts",
        "too many pixels",
    }
    assert set(rows) == {*tested, "anything else"}


def test_an_animation_of_one_frame_is_a_picture() -> None:
    """What counts is how many frames there are, not that the file could hold more."""
    frame = struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 1, 0, 0)
    extra = png_chunk(b"acTL", struct.pack(">II", 1, 0)) + png_chunk(b"fcTL", frame)
    (image_HWC,) = decode_json(json_body(png(8, 2, 1, 2, 3, extra=extra)), LIMITS).images_HWC
    assert image_HWC.tolist() == [[[1, 2, 3]]]


def test_pictures_of_several_sizes_keep_their_sizes() -> None:
    """No picture is resized to fit the others."""
    files = [picture(Image.new("RGB", size)) for size in ((3, 2), (2, 3), (64, 64), (1, 1))]
    shapes = [image.shape for image in decode_json(json_body(*files), LIMITS).images_HWC]
    assert shapes == [(2, 3, 3), (3, 2, 3), (64, 64, 3), (1, 1, 3)]


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("WEBP", {})])
def test_every_prefix_of_a_picture_is_refused(kind: str, options: dict[str, object]) -> None:
    """However little is missing."""
    whole = picture(Image.fromarray(random_images(8, 8, 3)), kind, **options)
    assert decode_json(json_body(whole), LIMITS).images_HWC[0].shape == (8, 8, 3)
    for end in range(len(whole)):
        with pytest.raises(ItemInvalid, match=r"image 0 .* send a whole file"):
            decode_json(json_body(whole[:end]), LIMITS)


def test_a_prompt_is_whole_text() -> None:
    """Half a surrogate pair, which JSON inside safetensors can hold, is no character."""
    body = safetensors.numpy.save({"images": np.zeros((2, 4, 4, 3), np.uint8)}, {"prompts": '["a", "\\ud800"]'})
    with pytest.raises(ItemInvalid, match="prompt 1 holds half a surrogate pair"):
        decode_batch(body, LIMITS)


@pytest.mark.parametrize(
    ("images", "prompts", "words"),
    [
        (np.zeros((1, 2, 2, 3)), None, "float64, expected uint8"),
        (np.zeros((2, 2, 3), np.uint8), None, r"shape \(2, 2, 3\)"),
        (np.zeros((0, 2, 2, 3), np.uint8), None, "no side of 0"),
        (np.zeros((1, 2, 2, 3), np.uint8), ["a", "b"], "2 prompts for 1 images"),
        (np.zeros((1, 2, 2, 3), np.uint8), "a", "sequence of strings"),
    ],
)
def test_the_encoders_refuse_what_is_no_batch(images: np.ndarray, prompts: list[str] | None, words: str) -> None:
    """The caller learns of it before anything is sent."""
    for encode in (encode_batch, encode_json):
        with pytest.raises(ValueError, match=words):
            encode(images, prompts)


def test_png_is_lossless() -> None:
    """Noise, the hardest picture, comes back to the last bit."""
    image_HWC = random_images(7, 5, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image_HWC)))), image_HWC)
