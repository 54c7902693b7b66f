# docker build -t fedftg . && docker run --rm -v fedftg:/data fedftg run default      More: docs/install.md
FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.12-slim
# The build of torch: whl/cpu, or whl/cu130 for an NVIDIA GPU.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=data,flower
COPY constraints.txt /tmp/
COPY --from=wheel /dist /tmp/dist
# The pin of torch holds for all builds: torch==2.13.0 takes 2.13.0+cpu before PyPI's 2.13.0.
RUN pip install --no-cache-dir -c /tmp/constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch \
 && pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /tmp/dist/*.whl)[$EXTRAS]" \
 && rm -r /tmp/dist /tmp/constraints.txt
# Works as any user (--user), also one without a name or a home: all that is written is in /data and /tmp.
RUN useradd fedftg && install -d -o fedftg -m 777 /data
ENV HOME=/tmp LOGNAME=fedftg FEDFTG_CACHE=/data/.cache/fedftg HF_HOME=/data/.cache/huggingface
USER fedftg
WORKDIR /data
VOLUME /data
ENTRYPOINT ["fedftg"]
CMD ["--help"]
