# The trainers on TRL's own image, with GPUs:
#   docker build -t trl-ulma .
#   docker run --rm --gpus all -v "$PWD:/data" trl-ulma pointwise-dpo --model Qwen/Qwen3-0.6B --dataset ratings.csv --output out
FROM huggingface/trl:1.16.0

WORKDIR /opt/trl-ulma
COPY pyproject.toml setup.cfg README.md LICENSE MANIFEST.in ./
COPY trl_ulma trl_ulma
RUN uv pip install --system --no-cache ".[evaluation,quantization]"

WORKDIR /data
ENTRYPOINT ["trl-ulma"]
CMD ["--help"]
