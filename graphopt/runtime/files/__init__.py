"""Tensors on disk: asynchronous direct I/O, and state that is updated as it streams by."""

from graphopt.runtime.files.folder import working_folder
from graphopt.runtime.files.memory import file_backed, page_aligned
from graphopt.runtime.files.streamed import Part, StreamedState
from graphopt.runtime.files.tensor_files import TensorFiles
from graphopt.runtime.files.transfer import Transfer

__all__ = ["Part", "StreamedState", "TensorFiles", "Transfer", "file_backed", "page_aligned", "working_folder"]
