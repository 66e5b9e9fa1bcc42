# An image with the program, which runs the quickstart:
#
#   docker build -t randlora-pl .
#   docker run --rm randlora-pl
#   docker run --rm --gpus all -v "$PWD:/work" randlora-pl fit --config clip_vitb32 --data.dataset cifar10
#
# The PyTorch of this image uses NVIDIA GPUs if there are any (`--gpus all`), else the CPU.
FROM python:3.11-slim
COPY . /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt "/source[language,onnx,serve]"
RUN useradd --create-home --uid 1000 user && install --directory --owner user /work
USER user
WORKDIR /work
ENTRYPOINT ["randlora-pl"]
CMD ["fit", "--config", "quickstart"]
