/* A camera of Linux that needs no device: preloaded, it answers for /dev/video0 as a driver does.

   Its frames are YUYV, 64 x 48, 100 a second, the n-th with a brightness of 16 + n. After CAMERA_LAST
   of them (of each time that it is opened) it is unplugged. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

enum { WIDTH = 64, HEIGHT = 48, SIZE = WIDTH * HEIGHT * 2, BUFFERS = 4 };
enum { STRIDE = 65536 };  /* of buffers: pages of any machine */

static int camera = -1, given;
static unsigned queue[BUFFERS], first, last;

static int open_camera(void) {
    given = first = last = 0;
    return camera = memfd_create("camera", 0);  /* which can be mapped, as a driver's memory */
}

#define OPENS(name)                                                      \
    int name(const char *path, int flags, ...) {                         \
        static int (*real)(const char *, int, ...);                      \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        int mode = va_arg(rest, int);                                    \
        va_end(rest);                                                    \
        if (!strcmp(path, "/dev/video0")) return open_camera();          \
        if (!real) real = dlsym(RTLD_NEXT, #name);                       \
        return real(path, flags, mode);                                  \
    }
OPENS(open)
OPENS(open64)

static int fails(int error) {
    errno = error;
    return -1;
}

static int give(struct v4l2_buffer *buffer) {
    static unsigned char frame[SIZE];
    if (given >= atoi(getenv("CAMERA_LAST"))) return fails(ENODEV);
    if (first == last) return fails(EAGAIN);
    usleep(10000);
    for (int i = 0; i < SIZE; i += 2) frame[i] = 16 + given, frame[i + 1] = 128;
    unsigned index = queue[first++ % BUFFERS];
    if (pwrite(camera, frame, SIZE, (long)index * STRIDE) != SIZE) return -1;
    buffer->index = index;
    buffer->bytesused = buffer->length = SIZE;
    buffer->sequence = given++;
    buffer->flags = 0;
    return gettimeofday(&buffer->timestamp, NULL);
}

int ioctl(int file, unsigned long request, ...) {
    static int (*real)(int, unsigned long, ...);
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (!real) real = dlsym(RTLD_NEXT, "ioctl");
    if (file != camera || camera < 0) return real(file, request, argument);
    struct v4l2_capability *capability = argument;
    struct v4l2_input *input = argument;
    struct v4l2_pix_format *format = &((struct v4l2_format *)argument)->fmt.pix;
    struct v4l2_captureparm *capture = &((struct v4l2_streamparm *)argument)->parm.capture;
    struct v4l2_buffer *buffer = argument;
    switch ((unsigned)request) {
    case (unsigned)VIDIOC_QUERYCAP:
        memset(capability, 0, sizeof *capability);
        capability->capabilities = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        return 0;
    case (unsigned)VIDIOC_G_INPUT:
        *(int *)argument = 0;
        return 0;
    case (unsigned)VIDIOC_ENUMINPUT:
        memset(input, 0, sizeof *input);
        input->type = V4L2_INPUT_TYPE_CAMERA;
        return 0;
    case (unsigned)VIDIOC_G_FMT:
    case (unsigned)VIDIOC_S_FMT:
        format->width = WIDTH;
        format->height = HEIGHT;
        format->pixelformat = V4L2_PIX_FMT_YUYV;
        format->field = V4L2_FIELD_NONE;
        format->bytesperline = WIDTH * 2;
        format->sizeimage = SIZE;
        return 0;
    case (unsigned)VIDIOC_G_PARM:
    case (unsigned)VIDIOC_S_PARM:
        capture->capability = V4L2_CAP_TIMEPERFRAME;
        capture->timeperframe.numerator = 1;
        capture->timeperframe.denominator = 100;
        return 0;
    case (unsigned)VIDIOC_REQBUFS:
        ((struct v4l2_requestbuffers *)argument)->count = BUFFERS;
        return ftruncate(camera, (long)BUFFERS * STRIDE);
    case (unsigned)VIDIOC_QUERYBUF:
        buffer->length = SIZE;
        buffer->m.offset = buffer->index * STRIDE;
        return 0;
    case (unsigned)VIDIOC_QBUF:
        queue[last++ % BUFFERS] = buffer->index;
        return 0;
    case (unsigned)VIDIOC_S_INPUT:
    case (unsigned)VIDIOC_STREAMON:
    case (unsigned)VIDIOC_STREAMOFF:
        return 0;
    case (unsigned)VIDIOC_DQBUF:
        return give(buffer);
    }
    return fails(EINVAL);
}
