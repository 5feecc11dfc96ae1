from randbatch.nn.batches import apply_in_batches, attend_in_batches  # noqa
from randbatch.nn.config import ATTRIBUTE, RandomBatchConfig as Sampling, config_of as sampling_of  # noqa
