"""What a pass over a video gives, kept for looking at."""

import os

import numpy as np

from moclip.pipeline.extract.decode import decode_video


class Sink:
    """Takes rows and frames. A restart forgets what came before it, as a writer would."""

    def __init__(self):
        self.restarts = -1
        self.restart()

    def restart(self):
        self.blocks, self.sampled = [], []
        self.restarts += 1

    def rows(self, rows):
        self.blocks.append(rows)

    def frame(self, frame):
        self.sampled.append(frame)

    def all(self, name):
        return np.concatenate([getattr(block, name) for block in self.blocks])


def decode(path, config, video_id="clip"):
    sink = Sink()
    return decode_video(os.fspath(path), video_id, config, sink), sink
