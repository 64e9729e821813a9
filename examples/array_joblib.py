"""joblib: workers that all write into one array.

Saved: joblib by itself writes large arguments to a file for each call, and maps it read-only.
A shared array is passed as a name: nothing is written, and workers can fill it.

Not saved: results that are returned are pickled, as ever: let workers write into a shared array
instead. Each task attaches the region anew; make tasks larger than that, some milliseconds.
"""

import numpy as np
from joblib import Parallel, delayed

import mshare


def smooth(source: mshare.SharedArray, target: mshare.SharedArray, row: int) -> None:
    """Fill one row of the target from the source, in a worker."""
    target[row] = (source[row - 1] + source[row] + source[row + 1]) / 3


def main() -> None:
    """Smooth an image; the result is here when the workers are done."""
    image = np.random.default_rng(1).random((102, 1000))
    source, target = mshare.share(image), mshare.share(np.zeros_like(image))
    Parallel(n_jobs=2)(delayed(smooth)(source, target, row) for row in range(1, 101))
    wanted = (image[:-2] + image[1:-1] + image[2:]) / 3
    assert np.allclose(target[1:-1], wanted)
    print("the image is smooth")


if __name__ == "__main__":
    main()
