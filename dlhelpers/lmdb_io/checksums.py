"""Which CRC-32: that of ISA-L where it is installed (extra ``codecs``), else that of zlib.

Both compute the polynomial of zlib and PNG, so that a database says nothing of who wrote it. zlib
up to 1.3 takes a table for each step; ISA-L multiplies without carries, as processors have
instructions for, and is faster than memory. benchmarks/io.py measures both beside memcpy.
Source: Gopal et al. 2009, Fast CRC Computation for Generic Polynomials Using PCLMULQDQ.
"""

from __future__ import annotations

__all__ = ["crc32"]

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32
