"""A cost model with round numbers, near those of a large GPU and an 8B model, for tests that need just any."""

from nanopd.cost_model.analytical import CostModel, DecodeCost, MixedCost, PrefillCost, Shape, TransferCost

PREFILL = PrefillCost(floor_seconds=8e-3, token_seconds=24e-6, pair_seconds=4e-10, sharpness=4.0)
DECODE = DecodeCost(floor_seconds=4.8e-3, sequence_seconds=25e-6, context_token_seconds=38e-9, sharpness=4.0)
MIXED = MixedCost(floor_seconds=7e-3, token_seconds=23e-6, pair_seconds=1e-9, sequence_seconds=2e-6, context_token_seconds=40e-9,
                  sharpness=3.0)
PEER = TransferCost("cuda:0", "cuda:1", "peer", latency_seconds=20e-6, bytes_per_second=390e9)
RELAY = TransferCost("cuda:0", "cuda:1", "relay", latency_seconds=60e-6, bytes_per_second=50e9)
MODEL = CostModel(PREFILL, DECODE, MIXED, (PEER, RELAY), Shape(num_layers=36, kv_bytes_per_token=147_456))
