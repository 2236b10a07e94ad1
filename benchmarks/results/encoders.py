"""What the three encoders make of the same recordings: a trained network, the same one untrained, and hand-made features."""

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_platform.data.index import Index
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.shards import preprocessed
from ssl_platform.encoder import Encoder
from ssl_platform.modalities._fbank import Fbank
from ssl_platform.modalities._sounds import decode_recording

TRAINED, RANDOM, HAND_MADE = "trained teacher", "random initialisation", "log-mel mean and std"


def network_features(checkpoint: Path, index: Index, random_init: bool = False) -> NDArray[np.float32]:
    """(N, D): the CLS features, as `ssl-eval extract` writes them."""
    encoder = Encoder.load(checkpoint, random_init=random_init)
    features = np.empty((len(index), encoder.embed_dim), np.float32)
    with torch.inference_mode(), closing(preprocessed(index, encoder.modality, batch_size=64, workers=1)) as batches:
        for views, numbers in batches:
            features[numbers.numpy()] = encoder(views).cls.float().numpy()
    return features


def hand_made(index: Index, fbank: Fbank) -> NDArray[np.float32]:
    """(N, 2 bins): mean and standard deviation over all frames of each log-mel band of the whole recording."""
    reader, rows = ShardReader(index, cache_shards=4), []
    for number in range(len(index)):
        recording = decode_recording(reader.read(number).members)
        num_samples = max(recording.num_samples(fbank.sample_rate), fbank.frame_length)
        bins = fbank(recording.read(0.0, num_samples, fbank.sample_rate))  # (frames, bins)
        rows.append(torch.cat([bins.mean(0), bins.std(0, correction=0)]))
    return torch.stack(rows).numpy()
