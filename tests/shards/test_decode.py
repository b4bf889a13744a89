import io
import struct
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shards.decode import Decoder
from shards.decode_check import levels_apart
from shards.errors import ConfigError
from shards.image_header import read_header
from shards.transforms import augment


def encode(pixels: np.ndarray, image_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


def picture(seed: int, height: int = 96, width: int = 96, bits: int = 8) -> np.ndarray:
    """Blobs, edges and some noise, as 8 or 16 bit grey [height, width]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    value = 0.45 + 0.3 * np.sin(7 * x + seed) * np.cos(5 * y) + 0.2 * (x + y > 1) + 0.02 * rng.standard_normal(x.shape)
    return (np.clip(value, 0, 1) * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)


def whole(views: int, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Full-range windows [V, 2] and depths [V]."""
    return np.tile([0.0, 2.0**bits - 1], (views, 1)), np.full(views, bits)


def decoder(**options) -> Decoder:
    # mean 0 and std 1 leave the window-normalised values in [0, 1]
    return Decoder(Decoder.Config(**{"image_size": 48, "mean": 0.0, "std": 1.0, **options}))


def parameters(views: int, **change) -> augment.ViewParameters:
    base = augment.identity(views)
    fields = {
        name: np.broadcast_to(np.asarray(value, float), getattr(base, name).shape) for name, value in change.items()
    }
    return augment.ViewParameters(**{**vars(base), **fields})


def one(image: bytes, bits: int = 8, window=None, options=None, **change) -> np.ndarray:
    default_window, depth = whole(1, bits)
    window = default_window if window is None else np.array([window], float)
    pixels, ok = decoder(**(options or {})).decode([image], parameters(1, **change), window, depth)
    assert ok.all()
    return pixels[0, 0].numpy()


def test_antialiased_resize_agrees_with_pillow():
    images = [encode(picture(i, 512, 512), "JPEG", quality=95) for i in range(6)]
    pixels, ok = decoder(image_size=224).decode(images, augment.identity(6), *whole(6))
    assert ok.all() and pixels.shape == (6, 1, 224, 224) and pixels.dtype == torch.float32
    for image, ours in zip(images, pixels[:, 0].numpy(), strict=True):
        theirs = np.asarray(Image.open(io.BytesIO(image)).resize((224, 224), Image.Resampling.BILINEAR)) / 255
        assert np.abs(ours - theirs).mean() <= 0.5 / 255  # promised: 1 / 255


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_host_and_graph_agree(fit):
    """What the CPU does outside of DALI is what DALI's graph does on a GPU, to about one level."""
    images, values, window, bits = mixed_batch()
    window[3], window[8] = (40.0, 180.0), (255.0, 0.0)
    values = augment.ViewParameters(**{**vars(values), "gamma": np.where(np.arange(24) % 5 == 0, 1.3, 1.0)})
    config = Decoder.Config(image_size=48, mean=0.0, std=1.0, fit=fit)
    on_host, ok = Decoder(config).decode(images, values, window, bits)
    in_graph, ok_graph = Decoder(config, whole_graph=True).decode(images, values, window, bits)
    assert ok.all() and ok_graph.all()
    difference = (on_host - in_graph).abs().flatten(1)
    assert difference.mean(dim=1).max() <= 0.5 / 255
    assert torch.equal(on_host[bits == 16], in_graph[bits == 16])
    assert not torch.equal(on_host, in_graph)  # two ways indeed


def test_two_decoders_are_compared_in_grey_levels():
    config = Decoder.Config(image_size=64)
    apart = levels_apart(Decoder(config, whole_graph=True), Decoder(config))
    assert len(apart) == 6 and 0 < max(apart.values()) < 0.5
    darker = Decoder(replace(config, fit="pad"))
    assert min(levels_apart(darker, Decoder(config)).values()) > 5
    refuses = Decoder(replace(config, max_pixels=1000))
    assert set(levels_apart(refuses, Decoder(config)).values()) == {np.inf}


def test_sixteen_bits_keep_their_depth():
    # Two levels that differ by 20 of 65,535 would be one level in 8 bits.
    pixels = np.full((64, 64), 30_000, np.uint16)
    pixels[:, 32:] += 20
    for image in (encode(pixels), encode(pixels, "JPEG2000", irreversible=False), encode(pixels, "TIFF")):
        shown = one(image, 16, window=(29_990, 30_030))
        assert shown[:, :20] == pytest.approx(0.25, abs=1e-3) and shown[:, -20:] == pytest.approx(0.75, abs=1e-3)


def test_colour_becomes_grey():
    grey = picture(3)
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.abs(one(encode(colour)) - one(encode(grey))).max() <= 1.5 / 255
    assert np.abs(one(encode(colour, "JPEG", quality=95)) - one(encode(grey, "JPEG", quality=95))).mean() <= 1 / 255


def test_normalisation_and_window():
    image = encode(picture(1))
    values = one(image)
    assert np.allclose(one(image, options={"mean": 0.5, "std": 0.25}), (values - 0.5) / 0.25, atol=1e-5)
    windowed = one(image, window=(51.0, 153.0))
    assert np.allclose(windowed, np.clip((values * 255 - 51) / 102, 0, 1), atol=1e-5)
    assert np.allclose(one(image, window=(255.0, 0.0)), 1 - values, atol=1e-5)  # white below black: MONOCHROME1
    black = one(encode(np.zeros((64, 64), np.uint8)))
    assert (black == 0).all()


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (48, 48), (300, 100)])
def test_fit(height, width):
    source = picture(2, height, width)
    image = Image.fromarray(source)
    side = min(height, width)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)

    def agree(ours: np.ndarray, theirs: Image.Image) -> bool:
        return bool(np.abs(ours - np.asarray(theirs) / 255).mean() <= 1 / 255)

    bilinear = Image.Resampling.BILINEAR
    assert agree(one(encode(source), options={"fit": "crop"}), image.resize((48, 48), bilinear, box=box))
    assert agree(one(encode(source), options={"fit": "stretch"}), image.resize((48, 48), bilinear))
    scale = 48 / max(height, width)
    inner = image.resize((round(width * scale), round(height * scale)), bilinear)
    padded = Image.new("L", (48, 48))
    padded.paste(inner, ((48 - inner.width) // 2, (48 - inner.height) // 2))
    assert agree(one(encode(source), options={"fit": "pad"}), padded)


def test_pad_is_black_whatever_the_window():
    image = encode(np.full((40, 80), 200, np.uint8))
    shown = one(image, options={"fit": "pad"}, window=(100.0, 250.0))
    assert (shown[:10] == 0).all() and (shown[-10:] == 0).all() and np.allclose(shown[14:34], 2 / 3, atol=1e-5)
    for change in ({}, {"angle_degrees": 5}, {"brightness": 0.9}, {"gamma": 1.1}):
        shown = one(image, options={"fit": "pad", "mean": 0.5, "std": 0.25}, **change)
        assert np.allclose(shown[0], -2, atol=1e-6) and shown[24, 24] > 0


def test_crop_parameters():
    source = picture(4, 96, 96)
    shown = one(encode(source), crop=[0.25, 0.5, 0.5, 0.25])  # left, top, width, height
    theirs = Image.fromarray(source).resize((48, 48), Image.Resampling.BILINEAR, box=(24, 48, 72, 72))
    assert np.abs(shown - np.asarray(theirs) / 255).mean() <= 1 / 255
    # With fit "pad" a crop may lie half outside of the image.
    shown = one(encode(np.full((48, 96), 255, np.uint8)), options={"fit": "pad"}, crop=[0.0, 0.0, 1.0, 0.5])
    assert (shown[:23] == 0).all() and (shown[25:] == 1).all()


def test_rotation_turns_counter_clockwise_about_the_centre():
    source = picture(5)
    plain = one(encode(source))
    assert np.abs(one(encode(source), angle_degrees=90) - np.rot90(plain)).max() < 1e-3
    assert np.abs(one(encode(source), angle_degrees=180) - np.rot90(plain, 2)).max() < 1e-3
    tilted = one(encode(np.full((96, 96), 255, np.uint8)), angle_degrees=20)
    assert tilted[0, 0] == 0 and tilted[24, 24] == 1


def test_exposure():
    image = encode(picture(6))
    plain = one(image)
    shown = one(image, brightness=1.1, contrast=0.8, gamma=1.2)
    expected = np.clip(1.1 * (0.5 + 0.8 * (plain.astype(np.float64) - 0.5)), 0, 1) ** 1.2

    assert np.abs(shown - expected).max() < 1e-4
    # The window is no clip of its own: dimming brings back what it cut, as a wider window would.
    dimmed = one(image, window=(0.0, 127.5), brightness=0.5)
    assert np.abs(dimmed - plain).max() < 1e-4
    normalised = one(image, brightness=1.1, contrast=0.8, gamma=1.2, options={"mean": 0.4, "std": 0.2})
    assert np.abs(normalised - (expected - 0.4) / 0.2).max() < 1e-3
    normalised = one(image, brightness=1.1, contrast=0.8, options={"mean": 0.4, "std": 0.2})
    assert np.abs(normalised - (expected ** (1 / 1.2) - 0.4) / 0.2).max() < 1e-3


def mixed_batch() -> tuple[list[bytes], augment.ViewParameters, np.ndarray, np.ndarray]:
    """24 images of both depths, several sizes and formats; a third of them not augmented."""
    images, bits = [], []
    for i in range(24):
        depth = 16 if i % 4 == 1 else 8
        pixels = picture(i, 50 + 13 * (i % 5), 64 + 7 * (i % 3), depth)
        images.append(encode(pixels, "JPEG", quality=95) if i % 4 == 2 else encode(pixels))
        bits.append(depth)
    drawn = augment.draw(augment.Config(), 7, np.zeros(24, int), np.arange(24), np.zeros(24, int))
    plain, keep = augment.identity(24), np.arange(24) % 3 == 0
    both = {
        name: np.where(keep.reshape(-1, *[1] * (value.ndim - 1)), value, getattr(drawn, name))
        for name, value in vars(plain).items()
    }
    window = np.stack([np.zeros(24), 2.0 ** np.array(bits) - 1], axis=1)
    return images, augment.ViewParameters(**both), window, np.array(bits)


def rows(values: augment.ViewParameters, index) -> augment.ViewParameters:
    return augment.ViewParameters(**{name: value[index] for name, value in vars(values).items()})


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pixels_do_not_depend_on_batch_or_threads(fit):
    images, values, window, bits = mixed_batch()
    reference, ok = decoder(fit=fit).decode(images, values, window, bits)
    assert ok.all() and reference.flatten(1).std(dim=1).min() > 0.02
    for threads in (2, 3):
        assert torch.equal(decoder(fit=fit, threads=threads).decode(images, values, window, bits)[0], reference)
    again = decoder(fit=fit)
    for index in (np.arange(24)[::-1], np.arange(5), np.array([23]), np.array([3, 3, 17]), np.arange(1, 24, 2)):
        pixels, ok = again.decode([images[i] for i in index], rows(values, index), window[index], bits[index])
        assert ok.all() and torch.equal(pixels, reference[torch.from_numpy(index.copy())])


def test_batches_ahead_keep_their_pixels():
    images, values, window, bits = mixed_batch()
    ahead = decoder(threads=2)
    pending = [ahead.submit(images[i:] + images[:i], values, window, bits) for i in range(5)]
    results = [batch.result() for batch in reversed(pending)][::-1]
    for i, result in enumerate(results):
        alone = decoder().decode(images[i:] + images[:i], values, window, bits)
        assert np.array_equal(result.ok, alone[1]) and torch.equal(result.pixel_values, alone[0])


def test_no_images():
    pixels, ok = decoder().decode([], augment.identity(0), *whole(0))
    assert pixels.shape == (0, 1, 48, 48) and ok.shape == (0,)


def broken_images() -> dict[str, bytes]:
    jpeg, png = encode(picture(8, 128, 128), "JPEG", quality=95), encode(picture(8))
    bomb = bytearray(png)
    bomb[16:24] = struct.pack(">II", 20_000, 20_000)
    return {
        "empty": b"",
        "text": b"not an image " * 20,
        "one byte": b"\xff",
        "1 x 1": encode(np.zeros((1, 1), np.uint8)),
        "20,000 x 20,000": bytes(bomb),
        "JPEG cut off": jpeg[: len(jpeg) // 2],
        "JPEG header only": jpeg[:200],
        "PNG cut off": png[: len(png) // 2],
        "PNG header only": png[:40],
        "PNG flipped byte": png[:600] + bytes([png[600] ^ 0xFF]) + png[601:],
        "16 bits declared as 8": encode(picture(8, bits=16)),
        "pickle": b"\x80\x04\x95" + bytes(100),
    }


@pytest.mark.parametrize("threads", [1, 2])
def test_bad_images_are_void_and_the_others_as_they_were(threads):
    bad = broken_images()
    good = [encode(picture(i), "JPEG", quality=90) for i in range(40)]
    values = augment.draw(augment.Config(), 3, np.zeros(40, int), np.arange(40), np.zeros(40, int))
    reference, _ = decoder().decode(good, values, *whole(40))
    images, places = list(good), np.arange(len(bad)) * 3 + 1
    for place, image in zip(places, bad.values(), strict=True):
        images[place] = image
    under_test = decoder(threads=threads)
    for _ in range(2):  # the second batch meets the rebuilt pipelines
        result = under_test.submit(images, values, *whole(40)).result()
        assert set(np.flatnonzero(~result.ok)) == set(places)
        assert torch.equal(result.pixel_values[result.ok], reference[result.ok])
        assert (result.pixel_values[~result.ok] == 0).all()
        assert all((cause is None) == ok for cause, ok in zip(result.causes, result.ok, strict=True))
    assert torch.equal(under_test.decode(good, values, *whole(40))[0], reference)


def test_bad_images_in_batches_that_overlap():
    bad, good = list(broken_images().values()), [encode(picture(i), "JPEG", quality=90) for i in range(20)]
    under_test = decoder(threads=2)
    reference, _ = decoder().decode(good, augment.identity(20), *whole(20))
    batches = [[*good[:i], bad[i], *good[i:]] for i in range(len(bad))]
    pending = [under_test.submit(batch, augment.identity(21), *whole(21)) for batch in batches]
    for i, batch in enumerate(pending):
        result = batch.result()
        assert np.flatnonzero(~result.ok).tolist() == [i]
        assert torch.equal(result.pixel_values[torch.from_numpy(result.ok)], reference)


def test_a_bad_image_keeps_no_broken_pipeline(monkeypatch: pytest.MonkeyPatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    build, most = Decoder._build, []

    def counted_build(self, operations):
        most.append(len(alive))
        instance = build(self, operations)
        alive.add(instance.pipeline)
        return instance

    monkeypatch.setattr(Decoder, "_build", counted_build)
    jpeg = encode(picture(8, 128, 128), "JPEG", quality=95)
    images = [encode(picture(i), "JPEG") for i in range(15)] + [jpeg[: len(jpeg) // 2]]
    _, ok = decoder().decode(images, augment.identity(16), *whole(16))
    assert ok.sum() == 15 and len(most) > 3 and max(most) == 0


def test_only_bad_images():
    bad = list(broken_images().values())
    pixels, ok = decoder().decode(bad, augment.identity(len(bad)), *whole(len(bad)))
    assert not ok.any() and (pixels == 0).all()


@pytest.mark.parametrize("window", [(7.0, 7.0), (0.0, float("nan"))])
def test_window_without_width_is_bad(window):
    result = decoder().submit([encode(picture(1))], augment.identity(1), np.array([window]), np.array([8])).result()
    assert not result.ok[0] and result.causes[0] == "window of no width"


def test_headers():
    grey, colour = picture(1, 30, 50), np.repeat(picture(1, 30, 50)[:, :, None], 3, axis=2)
    formats = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("TIFF", {}), ("BMP", {}), ("PPM", {})]
    formats += [("WEBP", {}), ("WEBP", {"lossless": True}), ("JPEG2000", {})]
    for name, options in formats:
        for pixels in (grey, colour):
            assert read_header(encode(pixels, name, **options)) == (50, 30, 8), name
    deep = picture(1, 30, 50, bits=16)
    for name in ("PNG", "TIFF", "JPEG2000", "PPM"):
        assert read_header(encode(deep, name)) == (50, 30, 16), name
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(grey, "JPEG", exif=exif)
    assert read_header(turned) == (50, 30, 8) and one(turned, options={"fit": "stretch"}).shape == (48, 48)


def test_headers_of_anything_do_not_raise():
    rng = np.random.default_rng(0)
    starts = [encode(picture(1), name)[:64] for name in ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "JPEG2000", "PPM")]
    for start in starts:
        for length in range(64):
            read_header(start[:length])
            read_header(start[:length] + rng.bytes(40))


def test_config_errors_name_the_value():
    for wrong in ({"fit": "squeeze"}, {"device": "tpu"}, {"image_size": 0}, {"threads": 0}, {"std": 0.0}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            Decoder.Config(**wrong)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="mixed"):
            Decoder(Decoder.Config(device="mixed"))


def test_pictures_of_many_makers(shared_data):
    """Progressive, colour and odd JPEG and PNG files from public case reports: decoded or refused, never a crash."""
    files = sorted(
        path for path in (shared_data / "raw_image_formats").iterdir() if path.suffix in (".jpg", ".jpeg", ".png")
    )
    images = [path.read_bytes() for path in files]
    bits = np.array([header.bits if (header := read_header(image)) else 8 for image in images])
    window = np.stack([np.zeros(len(bits)), 2.0**bits - 1], axis=1)
    pixels, ok = decoder(fit="pad").decode(images, augment.identity(len(images)), window, bits)
    assert ok.mean() > 0.9 and torch.isfinite(pixels).all()
