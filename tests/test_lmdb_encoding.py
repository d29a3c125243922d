"""Is a JPEG's header found where a walk over its segments finds it, whatever file came before?"""

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dlhelpers.lmdb_io import encoding


def a_jpeg(height, width, **options):
    pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", **options)
    return buffer.getvalue()


KINDS = [a_jpeg(8, 8), a_jpeg(9, 300), a_jpeg(8, 8, quality=50), a_jpeg(8, 9, progressive=True)]


def walked(data):
    frame = 0
    for marker, at in encoding.jpeg_segments(data):
        if marker == 0xDA:
            return at if frame else 0
        frame = frame or at * (marker in encoding.JPEG_FRAMES)
    return 0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            st.lists(st.tuples(st.integers(0, 640), st.integers(0, 255)), max_size=3),
            st.integers(0, 700) | st.none(),
        ),
        min_size=2,
        max_size=5,
    )
)
def test_the_first_scan_is_found_after_any_other_file(files):
    for data, flips, end in files:
        damaged = bytearray(data)
        for at, value in flips:
            damaged[at % len(damaged)] = value
        damaged = bytes(damaged[:end])
        assert encoding._first_scan(damaged) == walked(damaged)
