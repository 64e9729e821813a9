"""joblib: workers that all write into one array.

Saved: joblib by itself writes large arguments to a file for each call, and maps it read-only.
A shared array is passed as a name: nothing is written, and workers can fill it.

Not saved: results that are returned are pickled, as ever: let workers write into a shared array
instead. Each task attaches the region anew; make tasks larger than that, some milliseconds.
"""

import pickle

import numpy as np
from joblib import Parallel, delayed

import mshare


def smooth(
    source: mshare.SharedArray, target: mshare.SharedArray | None, row: int
) -> np.ndarray | None:
    """Make one row from the source, in a worker: fill the target with it, or return it."""
    result = np.asarray((source[row - 1] + source[row] + source[row + 1]) / 3)
    if target is None:
        return result
    target[row] = result
    return None


def main() -> None:
    """Smooth an image; the result is here when the workers are done."""
    image = np.random.default_rng(1).random((102, 10_000))
    source, target = mshare.share(image), mshare.share(np.zeros_like(image))
    Parallel(n_jobs=2)(delayed(smooth)(source, target, row) for row in range(1, 101))
    wanted = (image[:-2] + image[1:-1] + image[2:]) / 3
    assert np.allclose(target[1:-1], wanted)
    returned = Parallel(n_jobs=2)(delayed(smooth)(source, None, row) for row in range(1, 101))
    assert np.allclose(returned, wanted)

    def size(thing: object) -> int:
        return len(pickle.dumps(thing))

    assert size(source) + size(target) < 1000 < size(image)
    print(f"{'bytes that travel':<44}{'shared':>12}{'plain':>12}")
    print(f"{'the two arrays, to each of 100 tasks':<44}{size((source, target)):>12,}", end="")
    print(f"{image.nbytes:>12,}  (joblib: once, through a file)")
    print(f"{'not saved: each row that is returned':<44}{size(returned[0]):>12,}", end="")
    print(f"{size(wanted[0]):>12,}")
    print("the image is smooth")


if __name__ == "__main__":
    main()
