"""Models of other libraries in random batches: `convert`, its report, and what teaches it more classes.

`randbatch.conversion.hf.register` makes random batches an attention implementation of Hugging Face transformers, by
name.
"""

from randbatch.conversion.adapters import RandomBatches
from randbatch.conversion.convert import convert
from randbatch.conversion.libraries import hf
from randbatch.conversion.report import ConversionReport, Converted, Skipped

__all__ = ["ConversionReport", "Converted", "RandomBatches", "Skipped", "convert", "hf"]
