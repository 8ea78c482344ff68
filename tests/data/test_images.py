"""Pictures are read whole and upright, whatever their format; what is no picture is named."""

import logging
import os

import numpy as np
import pytest
from PIL import Image, features
from torch.utils.data import DataLoader

from stage_interactor.data import ImageReadError, check_readable, images, read_image, read_picture
from stage_interactor.data.images import IMAGE_SUFFIXES
from stage_interactor.untrusted.pictures import IMAGE_FORMATS, open_image

RAMP = np.arange(64 * 32).reshape(64, 32) / (64 * 32 - 1)  # from 0 to 1


def write_grey(path, bits, dtype=np.uint16, brightest=1.0, **options):
    """The ramp in values of some bits, in a file that stores 16 or more for each."""
    values = np.round(RAMP * brightest * (2**bits - 1)).astype(dtype)
    Image.fromarray(values).save(path, **options)
    return values


def test_each_suffix_is_of_a_format_that_is_read_and_each_format_has_one():
    Image.init()
    formats = Image.registered_extensions()
    assert {formats[suffix] for suffix in IMAGE_SUFFIXES} == set(IMAGE_FORMATS)
    assert list(IMAGE_SUFFIXES) == sorted(IMAGE_SUFFIXES)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_a_picture_of_every_format_is_read(tmp_path, suffix):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if suffix in (".jp2", ".j2k", ".jpx") and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    path = tmp_path / f"picture{suffix.upper()}"
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:, 16:] = (200, 40, 40)
    Image.fromarray(pixels).save(path)
    read = read_image(path)
    assert read.shape == (24, 32, 3) and read.dtype == np.uint8 and read.flags.writeable
    assert np.abs(read[12, [4, 28]].astype(int) - pixels[12, [4, 28]]).max() < 30
    assert np.array_equal(read_image(path, "BGR"), read[:, :, ::-1])


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff", "mpo"])
def test_of_several_pictures_in_a_file_the_first_is_read_and_that_is_told_once(
    tmp_path, suffix, caplog, monkeypatch
):
    monkeypatch.setattr(images, "_told", set())
    frames = [Image.new("RGB", (16, 8), (level, level, level)) for level in (0, 120, 240)]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 3
    frames[0].save(tmp_path / f"still.{suffix}")
    assert read_image(tmp_path / f"still.{suffix}").max() < 8 and not caplog.text
    for _ in range(2):
        assert read_image(path).max() < 8
    told = f"moving.{suffix} holds several pictures, of which the first is read"
    assert caplog.text.count(told) == (suffix != "mpo")


def test_smaller_versions_and_masks_of_a_tiff_are_no_pictures_of_their_own(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(images, "_told", set())
    large, small = (Image.new("RGB", (side, side)) for side in (64, 16))
    for name, kind in (("smaller.tif", 1), ("mask.tif", 4), ("page.tif", 2)):
        small.encoderinfo = {"tiffinfo": {254: kind}}
        large.save(tmp_path / name, save_all=True, append_images=[small])
        with Image.open(tmp_path / name) as image:
            image.seek(1)
            assert image.tag_v2[254] == kind
        assert read_image(tmp_path / name).shape == (64, 64, 3)
        assert bool(caplog.text) == (name == "page.tif")


def test_that_a_file_holds_several_pictures_is_not_told_by_each_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_told", set())
    frames = [Image.new("RGB", (16, 8), (level, 0, 0)) for level in (0, 120)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(images.logger, "handlers", [logging.FileHandler(tmp_path / "log.txt")])
    list(DataLoader([str(tmp_path / "a.gif")] * 2, num_workers=2, collate_fn=read_all))
    assert (tmp_path / "log.txt").read_text() == ""
    check_readable([str(tmp_path / "a.gif")])
    assert (tmp_path / "log.txt").read_text().count("holds several pictures") == 1


def read_all(paths):
    return [read_image(path) for path in paths]


@pytest.mark.parametrize("name", ["page.eps", "page.png"])
def test_what_another_program_would_have_to_draw_is_refused(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name, "EPS")
    with pytest.raises(ImageReadError, match=f"{name}: UnidentifiedImageError.* as any of .*PNG"):
        read_image(tmp_path / name)
    with pytest.raises(ImageReadError, match=name):
        check_readable([str(tmp_path / name)])


def test_pipes_and_devices_are_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, kind in ((tmp_path / "pipe.png", "pipe"), ("/dev/zero", "device"), (".", "folder")):
        with pytest.raises(ImageReadError, match=f"it is a {kind} and no file"):
            read_image(path)
        with pytest.raises(OSError, match="no file"):
            open_image(path)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_grey_values_of_cameras_keep_their_range_in_files_of_16_bits(tmp_path, bits, suffix):
    values = write_grey(tmp_path / f"grey.{suffix}", bits)
    read = read_image(tmp_path / f"grey.{suffix}")
    assert np.array_equal(read[..., 0], values.astype(int) * 255 // (2**bits - 1))
    assert (read == read[..., :1]).all() and read.min() == 0 and read.max() == 255


@pytest.mark.parametrize("dtype", [">u2", np.int32])
@pytest.mark.parametrize("bits", [12, 16])
def test_of_every_order_of_bytes_and_width_of_integers(tmp_path, dtype, bits):
    values = write_grey(tmp_path / "grey.tif", bits, dtype)
    expected = values.astype(int) * 255 // (2**bits - 1)
    assert np.array_equal(read_image(tmp_path / "grey.tif")[..., 0], expected)
    with Image.open(tmp_path / "grey.tif") as image:
        assert np.array_equal(read_picture(image)[..., 0], expected)


def test_a_dark_picture_stays_dark_where_its_file_says_what_white_is(tmp_path):
    write_grey(tmp_path / "plain.tif", 12, brightest=0.2)
    assert read_image(tmp_path / "plain.tif").max() > 200  # 10 bits hold it
    values = write_grey(tmp_path / "largest.tif", 12, brightest=0.2, tiffinfo={281: 4095})
    pack_12_bits(tmp_path / "packed.tif", values.astype(int))
    (tmp_path / "said.pgm").write_bytes(b"P5 32 64 4095\n" + values.astype(">u2").tobytes())
    for name in ("largest.tif", "packed.tif", "said.pgm"):
        read = read_image(tmp_path / name)[..., 0].astype(int)
        assert np.abs(read - values * (255 / 4095)).max() <= 1 and read.max() == 51, name


def pack_12_bits(path, values):
    """Writes a TIFF of one strip that stores three bytes for two values."""
    pairs = values.reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    data = packed.astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 277: 1, 278: height}
    tags |= {273: 8, 279: len(data)}
    file = b"II*\0" + (8 + len(data)).to_bytes(4, "little") + data
    file += len(tags).to_bytes(2, "little")
    for tag, value in sorted(tags.items()):
        file += tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
    path.write_bytes(file + bytes(4))


def test_what_is_neither_of_8_nor_of_16_bits_is_named(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray((RAMP * 1e6).astype(np.int32)).save(tmp_path / "large.tiff")
    Image.fromarray((RAMP * 100 - 50).astype(np.int32)).save(tmp_path / "negative.tiff")
    for name in ("float", "large", "negative"):
        with pytest.raises(ImageReadError, match=f"{name}.tiff.*neither of 8 nor of 16 bits"):
            read_image(tmp_path / f"{name}.tiff")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_other_modes_become_colours_of_8_bits(tmp_path, mode):
    path = tmp_path / ("other.tif" if mode == "CMYK" else "other.png")
    Image.fromarray(np.uint8(RAMP * 255)).convert("RGB").convert(mode).save(path)
    assert read_image(path).shape == (64, 32, 3)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, ">u2", np.int32])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_are_turned_upright(tmp_path, kind, suffix, orientation):
    if suffix == "png" and kind in (">u2", np.int32):
        pytest.skip("no such PNG")
    exif = Image.Exif()
    exif[274] = orientation
    bits = 8 if kind == np.uint8 else 16
    write_grey(tmp_path / f"turned.{suffix}", bits, kind, exif=exif)
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    expected = np.rot90(np.round(RAMP * (2**bits - 1)).astype(int) * 255 // (2**bits - 1), turns)
    read = read_image(tmp_path / f"turned.{suffix}")[..., 0]
    assert read.shape == expected.shape and np.array_equal(read, expected)
