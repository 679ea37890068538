# glmtune serve in a container. It serves the embedded model without a network, as a user without rights.
#
#   docker build -t glmtune .                                  for CPUs
#   docker build -t glmtune:gpu --build-arg DEVICE=cu128 .     for NVIDIA GPUs (the name of a build of PyTorch)
#   docker run --rm --init -p 127.0.0.1:8000:8000 glmtune      add `--gpus all` for GPUs
#   docker build -t glmtune --build-arg EXTRAS=deepspeed,web .      with optional parts of glmtune
#   docker run ... glmtune serve host=0.0.0.0 model=/models/chatglm2-6b     settings of one's own
#   docker run --rm --init --no-healthcheck -v "$PWD/runs:/home/glmtune/runs" glmtune train +recipe=ptuning
#
# compose.yaml has these as services: serve, train and eval, on CPUs or GPUs.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG DEVICE=cpu
ARG TORCH=torch==2.13.0
RUN python -m venv /opt/glmtune
ENV PATH=/opt/glmtune/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# PyTorch first and alone: it is large, changes seldom, and its build decides on which device the image runs.
RUN pip install --index-url "https://download.pytorch.org/whl/${DEVICE}" "${TORCH}"
COPY pyproject.toml README.md LICENSE /src/
COPY glmtune /src/glmtune
COPY evaluation /src/evaluation
COPY recipes /src/recipes
COPY configs /src/configs
COPY data /src/data
COPY scripts/glmtune-packages.pth /src/scripts/
COPY benchmarks/published.yaml /src/benchmarks/
ARG EXTRAS=
RUN pip install "/src${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}-slim
# The products of quantized weights are compiled for the processor on first use; without a compiler they are slower.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 glmtune && mkdir /models /home/glmtune/runs \
    && chown glmtune /models /home/glmtune/runs
COPY --from=build /opt/glmtune /opt/glmtune
ENV PATH=/opt/glmtune/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/models/hub
USER 10001
WORKDIR /home/glmtune
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
# "starting" until the model is loaded, at most ten minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["glmtune"]
CMD ["serve", "host=0.0.0.0"]
