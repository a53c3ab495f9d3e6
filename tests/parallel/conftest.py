"""Shared by the tests of the kinds of parallelism: what every sharded rank loads is loaded before ranks are forked."""

# FSDP2 and fake tensors load the compiler on their first use, about a second of work in each rank that has not inherited it.
import torch._dynamo  # noqa: F401

import shardwise.parallel.shard  # noqa: F401
