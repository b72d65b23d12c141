"""Which page of the cache belongs to whom: free lists and reference counts, on the host."""

from collections.abc import Iterable

import numpy as np


class PagePool:
  """The pages of one device's part of the cache, numbered 0 .. num_pages - 1."""

  def __init__(self, num_pages: int):
    self.num_pages = num_pages
    self._free = list(range(num_pages - 1, -1, -1))  # the lowest number is taken first
    self._references = np.zeros(num_pages, np.int32)

  @property
  def num_free(self) -> int:
    return len(self._free)

  def take(self, count: int) -> list[int] | None:
    """`count` pages with one reference each, or None, and nothing changed, where there are not so many."""
    if count > len(self._free):
      return None
    pages = [self._free.pop() for _ in range(count)]
    self._references[pages] = 1
    return pages

  def share(self, pages: Iterable[int]) -> list[int]:
    """Another reference to pages that are in use; they may only be read from now on."""
    pages = list(pages)
    assert all(self._references[page] > 0 for page in pages)
    self._references[pages] += 1
    return pages

  def release(self, pages: Iterable[int]) -> None:
    """Gives back one reference to each page; what nobody refers to is free."""
    for page in pages:
      assert self._references[page] > 0
      self._references[page] -= 1
      if self._references[page] == 0:
        self._free.append(page)

  def references(self, page: int) -> int:
    return int(self._references[page])


def pages_for(tokens: int, page_size: int) -> int:
  return -(-tokens // page_size)
